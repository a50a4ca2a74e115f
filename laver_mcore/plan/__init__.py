"""`laver plan`: which parallel layout fits a cluster, and which is fastest on paper."""
