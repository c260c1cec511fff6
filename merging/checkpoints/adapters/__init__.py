"""Reading of LoRA adapters as inputs: configs, tensor names, rows with the adapter added. No adapters as results."""
