"""The model, its compiled steps, and text from it."""
