"""A training step as one CUDA graph: one launch, where Python launches thousands of small kernels one after another."""

import warnings

import torch

WARM_UP = 3  # plain calls before the recording: cuDNN chooses its kernels, optimisers make their state


class Replayed:
    """A function without arguments, recorded at its fourth call and replayed from then on.

    What changes between two calls it must read from tensors that stay where they are, random numbers aside; it must not
    wait for the GPU (`.item()`), nor copy from main memory (PyTorch's notes on CUDA semantics, "CUDA Graphs"). Where it
    cannot be recorded, it is called as it is, and a line says so.

    Args:
        function: returns a dict of tensors on the GPU, the same names each time.
    """

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None
        self.stream = torch.cuda.Stream()  # of what comes before the recording too: autograd remembers it

    def __call__(self):
        """The function's dict; its tensors are the caller's own, another call leaves them as they are."""
        self.calls += 1
        if self.calls == WARM_UP + 1:
            self._record()
        if self.graph is None:
            return self._plain()
        self.graph.replay()
        return {name: tensor.detach().clone() for name, tensor in self.results.items()}

    def _plain(self):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True.*")  # an optimiser: not recorded yet
            results = self.function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _record(self):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.results = self.function()
        except RuntimeError as error:  # another PyTorch, another device: a recording helps, nobody needs it
            print(f"A step could not be recorded as a CUDA graph; it goes on unrecorded, which is slower ({error}).")
        else:
            self.graph = graph
