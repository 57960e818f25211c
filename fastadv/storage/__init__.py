"""Files that survive a crash: sealed, digested, and read without running their content."""
