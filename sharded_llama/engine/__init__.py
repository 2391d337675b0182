"""Running the model: compiled steps, and generation on top of them."""
