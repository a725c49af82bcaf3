"""A strategy beside one device."""
