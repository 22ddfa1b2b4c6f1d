"""Random streams that are functions of a seed, a purpose and a position."""

from diffusion_core.randomness.streams import Purpose, Streams, drawn_as, generator, stream_seed, streams

__all__ = ["Purpose", "Streams", "drawn_as", "generator", "stream_seed", "streams"]
