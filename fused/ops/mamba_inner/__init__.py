"""All of a mixer behind in_proj as one operator: convolution, x_proj, dt_proj, scans, gate, out_proj. Native only."""
