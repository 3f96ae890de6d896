"""An edit in GGUF files: tensors in place, an adapter, a control vector; and the format itself."""
