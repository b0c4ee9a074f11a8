"""`hrpro dashboard`: a page for the person in front of the cameras; needs the extra `dashboard`."""
