"""What VideoMamba is compared with: models of other kinds, one file each, written for the comparison."""
