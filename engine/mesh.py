"""How many ranks each kind of parallelism gets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Ranks by axis, as config states them.

    Attributes:
        data: ranks that see different samples; None for all that the others leave.
        tensor: ranks that share each layer.
        pipeline: ranks that have different layers.
    """

    data: int | None = None
    tensor: int = 1
    pipeline: int = 1

    def check(self, world: int, where: str) -> None:
        """Whether the engine can train on this mesh.

        Args:
            world: ranks that there are.
            where: what an error calls the place.

        Raises:
            ValueError: a size below 1, a product other than `world`, or a kind of parallelism that is not performed.
        """
        data = self.data if self.data is not None else max(1, world // max(1, self.tensor * self.pipeline))
        sizes = {"dp_size": data, "mp_size": self.tensor, "pipeline_size": self.pipeline}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{where}: {name} = {size}; allowed: an integer >= 1")
        if (product := data * self.tensor * self.pipeline) != world:
            raise ValueError(
                f"{where}: {' * '.join(sizes)} = {data} * {self.tensor} * {self.pipeline} = {product}, but world ="
                f" {world}; start {product} ranks, or change the sizes"
            )
        for name, kind in (("mp_size", "tensor"), ("pipeline_size", "pipeline")):
            if sizes[name] > 1:
                raise ValueError(
                    f"{where}: {name} = {sizes[name]}; allowed: 1, because {kind} parallelism is not performed yet;"
                    f" dp_size = {world} trains on the same ranks"
                )
