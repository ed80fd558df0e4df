"""C++ for the operations that dominate a decoding step, one file for each, and the operators in Python."""
