"""Where a run happens: the command line, launchers, Ray clusters, jobs and Kubernetes."""
