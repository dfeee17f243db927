"""2:4 products on GPUs. Importable without a GPU; nothing is compiled before it is first used."""
