"""Speed and memory of converted files against the forward pass and against other tools: `tools/bench`."""
