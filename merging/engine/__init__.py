"""Loop over tensors: blocks, prefetch, copies to a device, execution on CPU and GPU. No method and no file format."""
