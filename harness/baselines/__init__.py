"""The models with which VideoMamba is compared, one file each, written for the comparison."""
