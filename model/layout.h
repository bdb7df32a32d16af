/* Where every vector and packed matrix of a stage's weights lies in its one block of memory: follows from the layer
 * table alone, so budgets can be made before anything is read. Private to model/weights*.c and their tests. */
#ifndef SH_MODEL_LAYOUT_H
#define SH_MODEL_LAYOUT_H

#include "model/weights.h"

/* Sets every pointer of w (config, share, held, first, last, layer[] given; expert: room for 2·experts matrices per
 * layer of the stage, or NULL) into the block at base, 64-byte aligned, and returns the bytes used. base NULL: counts
 * only, sets data NULL. */
size_t sh_weights_layout(sh_weights *w, sh_wmat *expert, void *base);
/* Bytes of the tables beside the block: sh_layer_weights and the experts' sh_wmat. */
size_t sh_weights_table_bytes(const sh_config *c, int first, int last);

#endif
