"""One file a verb, each a story to be read from top to bottom. They print nothing and return what happened."""
