"""A page that draws, compares and edits images in a browser: `varjax demo`."""
