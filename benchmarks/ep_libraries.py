"""Libraries that ep_beside.py can time beside ours, through what they offer to anybody. Each has to be installed.

torch's `all_to_all_vdev` moves rows whose numbers are on the device; what lies around it here is plain torch. It needs
symmetric memory of NVSHMEM, which this process then uses for everybody. FlashInfer's is the one-sided form. NCCL EP has
a low-latency form, here rank-major, and a high-throughput one, here flat.
"""

from importlib.metadata import version
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from ep_peers import Case, Peer, Rows

from moecache.kernels.ep.context import EpContext

PATIENCE = 20  # seconds that a kernel waits for a rank


def group_of(ctx: EpContext) -> Any:
    return ctx.group or dist.group.WORLD


def local(ctx: EpContext, ids: torch.Tensor) -> torch.Tensor:
    """Numbers among all experts, of numbers among this rank's."""
    return torch.where(ids >= 0, ids + ctx.experts_of(ctx.rank).start, -1)


class Vdev(Peer):
    name = "torch_vdev"

    @classmethod
    def version(cls) -> str:
        return f"torch {torch.__version__} all_to_all_vdev, NVSHMEM {version('nvidia-nvshmem-cu13')}"

    @classmethod
    def prepare(cls) -> None:
        import torch.distributed._symmetric_memory as symmetric

        symmetric.set_backend("NVSHMEM")

    def __init__(self, ctx: EpContext, case: Case, sent: Rows) -> None:
        import torch.distributed._symmetric_memory as symmetric

        super().__init__(ctx, case, sent)
        most, scales = ctx.world * case.tokens, sent[1].shape[1] if len(sent) > 1 else 0
        width = 2 * ctx.topk + scales
        width = 16 if width <= 16 else -(-width // 128) * 128  # so that each block's share begins on 16 bytes

        def shared(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            made = symmetric.empty(*shape, dtype=dtype, device=ctx.device)
            symmetric.rendezvous(made, group_of(ctx))
            return made.zero_()

        self.rows, self.came = (shared(most, ctx.hidden, dtype=sent[0].dtype) for _ in range(2))
        self.notes, self.notes_came = (shared(most, width, dtype=torch.int32) for _ in range(2))
        self.y, self.back = (shared(most, ctx.hidden, dtype=ctx.dtype) for _ in range(2))
        self.counts, self.counts_back = (shared(ctx.world, dtype=torch.int64) for _ in range(2))
        self.splits, self.notes_splits, self.back_splits = (shared(2, ctx.world, dtype=torch.int64) for _ in range(3))
        self.ranks = torch.arange(ctx.world, device=ctx.device)
        self.owner = torch.empty(ctx.experts, dtype=torch.int64, device=ctx.device)
        for rank in range(ctx.world):
            self.owner[ctx.experts_of(rank).start : ctx.experts_of(rank).stop] = rank
        self.ids = case.ids.long()
        self.group = group_of(ctx).group_name

    def dispatch(self) -> None:
        wanted = (self.owner[self.ids][:, :, None] == self.ranks).any(1).T  # [world, T]
        token = torch.sort((~wanted).flatten(), stable=True).indices % self.case.tokens
        torch.index_select(self.sent[0], 0, token, out=self.rows)
        parts = [
            self.ids.int(),
            self.case.weights.view(torch.int32),
            *(each.view(torch.int32) for each in self.sent[1:]),
        ]
        notes = torch.cat(parts, 1)
        self.notes[:, : notes.shape[1]] = notes[token]
        self.counts.copy_(wanted.sum(1))
        torch.ops.symm_mem.all_to_all_vdev(self.rows, self.came, self.counts, self.splits, self.group)
        torch.ops.symm_mem.all_to_all_vdev(self.notes, self.notes_came, self.counts, self.notes_splits, self.group)
        self.wanted, self.place = wanted, (wanted.flatten().cumsum(0) - 1).clamp(min=0).view(wanted.shape)

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        count, topk = int(self.splits[0].sum()), self.ctx.topk
        notes = self.notes_came[:count]
        scales = [
            notes[:, 2 * topk : 2 * topk + each.shape[1]].contiguous().view(torch.float32) for each in self.sent[1:]
        ]
        weights = notes[:, topk : 2 * topk].contiguous().view(torch.float32)
        return (self.came[:count], *scales), notes[:, :topk], weights

    def fill(self, y: torch.Tensor) -> None:
        self.y[: len(y)] = y

    def combine(self) -> torch.Tensor:
        self.counts_back.copy_(self.splits[0])
        torch.ops.symm_mem.all_to_all_vdev(self.y, self.back, self.counts_back, self.back_splits, self.group)
        home = torch.where(self.wanted[:, :, None], self.back[self.place], 0)
        return home.sum(0, dtype=torch.float32).to(self.ctx.dtype)


class FlashInfer(Peer):
    name = "flashinfer"

    @classmethod
    def version(cls) -> str:
        return f"flashinfer-python {version('flashinfer-python')}, one-sided"

    def __init__(self, ctx: EpContext, case: Case, sent: Rows) -> None:
        from flashinfer.moe_ep import BootstrapConfig, MoEEpCommParams, NVLinkOneSidedConfig, create_communication

        super().__init__(ctx, case, sent)
        bootstrap = BootstrapConfig(ctx.world, ctx.rank, device=ctx.device.index, process_group=group_of(ctx))
        params = MoEEpCommParams(ctx.experts, ctx.topk, case.tokens, ctx.hidden, dtype=ctx.dtype)
        self.both = create_communication(bootstrap, params, NVLinkOneSidedConfig(timeout_sec=PATIENCE))
        self.ids = case.ids.int()
        self.out = torch.empty(case.tokens, ctx.hidden, dtype=ctx.dtype, device=ctx.device)

    def dispatch(self) -> None:
        scales = self.sent[1] if len(self.sent) > 1 else None
        self.got = self.both.dispatch(self.sent[0], self.ids, self.case.weights, hidden_states_scale=scales)

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        got = self.got
        self.held = (got.topk_ids >= 0).any(1)  # the places behind the last row of each rank have ids of −1
        rows = (got.hidden_states,) if got.hidden_states_scale is None else (got.hidden_states, got.hidden_states_scale)
        return tuple(each[self.held] for each in rows), got.topk_ids[self.held], got.topk_weights[self.held]

    def fill(self, y: torch.Tensor) -> None:
        self.both.get_combine_input_buffer(self.ctx.dtype)[self.held] = y

    def combine(self) -> torch.Tensor:
        return self.both.combine(self.both.get_combine_input_buffer(self.ctx.dtype), output=self.out)

    def close(self) -> None:
        self.both.destroy()


class NcclEp(Peer):
    name = "nccl_ep"
    high: ClassVar[bool] = False  # throughput
    communicator: ClassVar[Any] = None

    @classmethod
    def version(cls) -> str:
        from nccl import ep

        return f"NCCL EP {ep.get_lib_version()}"

    def __init__(self, ctx: EpContext, case: Case, sent: Rows) -> None:
        from nccl import ep
        from nccl.ep.interop.torch import get_nccl_comm_from_group

        super().__init__(ctx, case, sent)
        if self.high and ctx.world * case.tokens % 4:
            raise ValueError(
                f"NCCL EP's flat rows want ranks × tokens to be a multiple of 4, not {ctx.world * case.tokens}"
            )
        if NcclEp.communicator is None:
            NcclEp.communicator = get_nccl_comm_from_group(ctx.group)
        most = ctx.world * case.tokens
        self.made = ep.Group.create(NcclEp.communicator, ep.GroupConfig(
            algorithm=ep.Algorithm.HIGH_THROUGHPUT if self.high else ep.Algorithm.LOW_LATENCY, num_experts=ctx.experts,
            max_dispatch_tokens_per_rank=case.tokens, max_recv_tokens_per_rank=most if self.high else 0,
            max_token_bytes=ctx.hidden * ctx.dtype.itemsize, timeout_ns=PATIENCE * 10**9, num_topk=ctx.topk,
        ))  # fmt: skip
        places = (most,) if self.high else (ctx.world, case.tokens)
        types = [torch.float8_e4m3fn if each.dtype == torch.uint8 else each.dtype for each in sent]
        self.rows = [each.view(kind) for each, kind in zip(sent, types, strict=True)]
        self.came = [torch.empty(*places, each.shape[1], dtype=each.dtype, device=ctx.device) for each in self.rows]
        self.ids, self.out = case.ids.long(), torch.empty_like(case.x)
        kind = torch.int64 if self.high else torch.int32  # no other is taken
        self.came_ids = torch.full((*places, ctx.topk), -1, dtype=kind, device=ctx.device)
        self.came_weights = torch.zeros(*places, ctx.topk, device=ctx.device)
        self.y = torch.zeros(*places, ctx.hidden, dtype=ctx.dtype, device=ctx.device)
        self.counts = torch.zeros(1 if self.high else ctx.world, dtype=torch.int32, device=ctx.device)
        counted = {"recv_total_counter" if self.high else "src_rank_counters": ep.Tensor(self.counts)}
        layout = ep.LayoutInfo(recv_topk_idx_kind=ep.ExpertIdKind.LOCAL, **counted)
        self.at_update = layout if self.high else None
        self.at_dispatch = None if self.high else layout
        self.topk = ep.Tensor(self.ids)
        names = ("tokens", "scales")[: len(sent)]
        tensors = dict(zip(names, map(ep.Tensor, self.rows), strict=True))
        outputs = dict(zip(names, map(ep.Tensor, self.came), strict=True))
        self.inputs = ep.DispatchInputs(topk_weights=ep.Tensor(case.weights), **tensors)
        self.outputs = ep.DispatchOutputs(
            topk_weights=ep.Tensor(self.came_weights), topk_idx=ep.Tensor(self.came_ids), **outputs
        )
        self.config = ep.DispatchConfig(quantization_recipe=ep.DispatchQuantizationRecipe.FWD) if sent[1:] else None
        self.home = ep.CombineInputs(tokens=ep.Tensor(self.y))
        self.home_out = ep.CombineOutputs(tokens=ep.Tensor(self.out))
        shape = ep.Layout.FLAT if self.high else ep.Layout.RANK_MAJOR
        self.handle = self.made.create_handle(shape, self.topk, layout_info=self.at_update, stream=self.stream())

    @staticmethod
    def stream() -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def dispatch(self) -> None:
        self.handle.update(self.topk, layout_info=self.at_update, stream=self.stream())
        self.handle.dispatch(
            self.inputs, self.outputs, layout_info=self.at_dispatch, config=self.config, stream=self.stream()
        )

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        most = self.counts if self.high else self.counts[:, None]
        self.held = torch.arange(self.came_ids.shape[-2], device=self.ctx.device) < most
        rows = tuple(each.view(sent.dtype)[self.held] for each, sent in zip(self.came, self.sent, strict=True))
        return rows, local(self.ctx, self.came_ids[self.held]), self.came_weights[self.held]

    def fill(self, y: torch.Tensor) -> None:
        self.y[self.held] = y

    def combine(self) -> torch.Tensor:
        self.handle.combine(self.home, self.home_out, stream=self.stream())
        return self.out

    def close(self) -> None:
        torch.cuda.synchronize()
        self.handle.destroy()
        self.made.destroy()


class NcclEpHigh(NcclEp):
    name = "nccl_ep_ht"
    high = True
