"""Our commands beside Lightning's, one file or folder each: the function that does the work is the command."""
