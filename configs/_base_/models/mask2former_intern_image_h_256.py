"""mask2former_intern_image_h.py with the smaller head of InternImage-H on Cityscapes, Mapillary, Pascal Context and
NYU Depth V2: 256 wide, 8 heads of attention, 100 queries."""

_base_ = "./mask2former_intern_image_h.py"
width = 256
attention = dict(embed_dims=width, num_heads=8)
position = dict(num_feats=width // 2)

model = dict(
    decode_head=dict(
        feat_channels=width,
        out_channels=width,
        num_queries=100,
        pixel_decoder=dict(
            encoder=dict(
                transformerlayers=dict(
                    attn_cfgs=attention, ffn_cfgs=dict(embed_dims=width, feedforward_channels=4 * width)
                )
            ),
            positional_encoding=position,
        ),
        positional_encoding=position,
        transformer_decoder=dict(
            transformerlayers=dict(
                attn_cfgs=attention,
                ffn_cfgs=dict(embed_dims=width, feedforward_channels=8 * width),
                feedforward_channels=8 * width,
            )
        ),
    ),
)
