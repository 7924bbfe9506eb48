import torch
from ssd_kernels.reference import clip_scale, by_network
from ssd_kernels.row_update import project_, global_norm
def dense_update(weights, gradients, *, lr, max_norm, nonnegative=False, normalize=None, momentum=0.0, buffers=None, samples=None, blocks=1):
    for b in range(blocks):
        if samples is not None and not samples[b] > 0: continue
        w=[x.chunk(blocks)[b] for x in weights]; g=[x.chunk(blocks)[b] for x in gradients]
        pick=lambda v: v[b] if isinstance(v, torch.Tensor) else v
        scale=clip_scale(global_norm(g), pick(max_norm))
        for n,(a,c) in enumerate(zip(w,g)):
            d=c*scale
            if buffers: d=buffers[n].chunk(blocks)[b].mul_(momentum).add_(d)
            a.sub_(pick(lr)*d)
            project_(a, nonnegative, normalize[n])
