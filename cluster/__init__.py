"""WHERE a run happens: the command line, Ray sessions, preflight."""
