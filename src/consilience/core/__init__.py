"""The core: types, the step, the loop. It knows no other room."""
