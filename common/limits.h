/* Every limit on input and queues, in one place. An error that a limit causes states it. */
#ifndef SH_COMMON_LIMITS_H
#define SH_COMMON_LIMITS_H

#define SH_MAX_LINE_BYTES      ((size_t)32 << 20) /* one request line */
#define SH_MAX_CUSTOM_ID       512                /* bytes of custom_id */
#define SH_MAX_JSON_DEPTH      64
#define SH_MAX_CONFIG_BYTES    ((size_t)16 << 20)  /* config.json, generation_config.json, tokenizer_config.json */
#define SH_MAX_TOKENIZER_BYTES ((size_t)256 << 20) /* tokenizer.json */
#define SH_MAX_VOCAB           (1 << 24)           /* ids of a tokenizer */
#define SH_MAX_ADDED_TOKEN     1024                /* bytes of one added token */
#define SH_MAX_ST_HEADER       ((size_t)100 << 20) /* safetensors header: the format's own limit */
#define SH_MAX_GGUF_KEYS       65536               /* metadata of one GGUF file */
#define SH_MAX_GGUF_TENSORS    (1 << 20)           /* of one GGUF file */
#define SH_MAX_LAYERS          512
#define SH_MAX_WIDTH           (1 << 20) /* hidden, feed-forward, heads × head_dim: far beyond any model, safe in products */
#define SH_MAX_HEADS           (1 << 14) /* and head_dim */
#define SH_MAX_CONTEXT         (1 << 24) /* positions, windows */
#define SH_MAX_RANKS           4096
#define SH_MAX_EXPERTS         4096 /* of one layer */
#define SH_MAX_STOPS           16   /* stop strings of one request */
#define SH_MAX_STOP_BYTES      1024
#define SH_MAX_STOP_IDS        64
#define SH_MAX_TOP_LOGPROBS    20
#define SH_LOGIT_ROWS          64                 /* rows that go through the head together */
#define SH_SAMPLE_THREADS      16                 /* of a rank that sample at most: each has memory for a row */
#define SH_MAX_SEQS            4096               /* sequences at once in a group */
#define SH_MAX_CHUNK           8192               /* prompt tokens per step */
#define SH_MAX_MESSAGE         ((size_t)64 << 20) /* one message on a ZeroMQ socket */
#define SH_MAX_ROW_BYTES       ((size_t)60 << 20) /* one row of results: it travels in one message */
#define SH_USUAL_CONTEXT       131072             /* prompt and output together, unless --max-context says otherwise */
#define SH_MAX_INFLIGHT        64                 /* micro-batches in flight in a group */

#endif
