"""`hrpro label`: a local page that writes point labels; needs the extra `label`."""
