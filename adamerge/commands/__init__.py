"""Plain functions behind `adamerge COMMAND`: a signature is a command line, an integer an exit code."""
