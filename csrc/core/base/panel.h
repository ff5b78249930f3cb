/* How tokens lie side by side in the forward pass: a panel holds LMC_LANES tokens, feature-major, so that
 * panel[feature * LMC_LANES + lane] is a feature of one of them. */
#ifndef LLMCOMP_CORE_BASE_PANEL_H
#define LLMCOMP_CORE_BASE_PANEL_H

#define LMC_LANES 16

#endif
