"""C++ for the operations that dominate a decoding step, one file for each, for compiled programs and for the model."""
