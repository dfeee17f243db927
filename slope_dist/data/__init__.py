"""Text to tokens on disk, and tokens on disk to samples by index. The modules are imported one by one."""
