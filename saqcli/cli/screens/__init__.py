"""What commands print: tables of results, readings of instruments, the plan of a dry run."""
