"""Headers of file formats that the exporter and the runtime both read."""
