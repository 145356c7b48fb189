"""Small services: files, checkpoints, processes, checks of options, registries, imports."""
