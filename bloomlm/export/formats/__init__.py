"""Programs for other people's runtimes, each written by that runtime's own library, which is an extra."""
