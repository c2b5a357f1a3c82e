"""Is a cache file still true here: whether it is sound, usable and still right, and what this machine has."""
