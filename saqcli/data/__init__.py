"""Images: folders and archives, loaders, transforms."""
