"""The networks, one LightningModule and one file per paper."""
