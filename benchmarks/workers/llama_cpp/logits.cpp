// Logits of a GGUF model on some tokens, under a control vector or none: logits LIBRARIES MODEL VECTOR|- OUT TOKEN ...
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common.h"
#include "ggml-backend.h"
#include "llama.h"

int main(int argc, char ** argv) {
    ggml_backend_load_all_from_path(argv[1]);
    llama_model * model = llama_model_load_from_file(argv[2], llama_model_default_params());
    std::vector<llama_token> tokens;
    for (int i = 5; i < argc; ++i) tokens.push_back(atoi(argv[i]));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512;
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (std::string(argv[3]) != "-") {
        const common_control_vector_data found = common_control_vector_load({{1.0f, argv[3]}});
        if (found.n_embd < 0) return 2;
        const int n_layers = llama_model_n_layer(model);
        if (llama_set_adapter_cvec(context, found.data.data(), found.data.size(), found.n_embd, 1, n_layers)) return 3;
    }
    llama_batch batch = llama_batch_init((int) tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i] = tokens[i];
        batch.pos[i] = (llama_pos) i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    batch.n_tokens = (int) tokens.size();
    if (llama_decode(context, batch)) return 4;
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    FILE * out = fopen(argv[4], "wb");
    for (int i = 0; i < batch.n_tokens; ++i) fwrite(llama_get_logits_ith(context, i), sizeof(float), n_vocab, out);
    fclose(out);
    return 0;
}
