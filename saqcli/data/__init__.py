"""Images on disk: folders, archives, transforms, loaders."""
