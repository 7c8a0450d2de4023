"""What is run on an accelerator: kernels, head, student update, a real pair, the medium lab."""
