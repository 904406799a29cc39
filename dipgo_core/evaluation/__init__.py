"""Images from seeds, and figures with intervals: the part of the method that measures."""
