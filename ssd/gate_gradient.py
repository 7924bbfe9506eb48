import torch
def gate_gradient(gradient, gate, slopes=None, positions=None, *, gated=True):
    S = 1 if positions is None else len(positions)//gradient.shape[1]
    def add():
        if slopes is None: return
        pad=torch.nn.functional.pad(slopes,(0,1))
        B=len(slopes)//S
        for s in range(S):
            gradient[s*B:(s+1)*B] += pad[s*B:(s+1)*B][:, positions.view(S,-1)[s]]
    if gated: add()
    gradient.masked_fill_(~(gate>0), 0.0)
    if not gated: add()
