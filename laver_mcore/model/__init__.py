"""The model: layer specs, mixed attention, vision encoders, connector, heads, and the EMA teacher."""
