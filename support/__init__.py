"""What a run needs and no paper has: files, downloads, tasks, flags, processes, seeds."""
