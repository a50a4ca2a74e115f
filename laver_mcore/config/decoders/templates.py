"""Chat templates for tokenizers that bring none, as their models' makers publish them, in transformers' Jinja."""

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Qwen's, without the system turn that Qwen2.5 adds where a dialogue brings none."""

# lm-sys/FastChat, fastchat/conversation.py, vicuna_v1.1: separators " " and "</s>".
VICUNA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + ' ' }}
{%- elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}
{%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# meta-llama/llama, llama/generation.py, chat_completion.
LLAMA_2 = """\
{%- if messages[0]['role'] == 'system' %}
{%- set turns, system = messages[1:], '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}{% set turns, system = messages, '' %}{% endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

# meta-llama/llama3, llama/tokenizer.py, ChatFormat.
LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA, "llama2": LLAMA_2, "llama3": LLAMA_3}
"""By the names that a recipe gives them."""
