"""Chat templates of the kinds that models have, shortened to what their forms differ in."""

from __future__ import annotations

SPECIALS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<|call|>", "<|sep|>"),
    *("<|calls|>", "<|endcalls|>", "<|endcall|>"),
]
"""Control tokens of these templates."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TRIMMED = CHATML.replace("m.content", "(m.content | trim)")
"""As Llama 3's, which strips what messages begin and end with."""

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)

HUMAN = (
    "{% for m in messages %}{{ '### ' + ('Human' if m.role == 'user' else 'Assistant') + ': ' }}"
    "{{ m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)

ALPACA = (
    "{% for m in messages %}{{ '### Instruction:\n' if m.role == 'user' else '### Response:\n' }}"
    "{{ m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}"
    "{% endif %}"
)

VICUNA = (
    "{% for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' +"
    " m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ t | tojson }}"
    "{% endfor %}{{ '</tools><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name +'
    " '\", \"arguments\": ' }}{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen 2.5's."""

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role =="
    " 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + ({'name': c.function.name,"
    " 'arguments': c.function.arguments} | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As Qwen 3's."""

LLAMA_3 = (
    '{% if tools %}{{ \'<|start|>system<|end|>Answer {"name": ..., "parameters": ...}\n\' }}'
    "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{{ '<|eot|>' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one tool call at a time') }}{% endif %}"
    '{{ \'<|start|>assistant<|end|>\n\n{"name": "\' + m.tool_calls[0].function.name'
    " + '\", \"parameters\": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|end|>\n\n' + (m.content | trim) + '<|eot|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ '<s>' }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}"
    "{{ ', ' if not loop.last }}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}{{ '[TOOL] ' + m.content + '[/TOOL]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)

MISTRAL_11 = (
    "{{ '<s>' }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name }}"
    "{{ '[ARGS]' }}{{ c.function.arguments | tojson }}{% endfor %}</s>"
    "{% elif m.role == 'tool' %}{{ '[TOOL] ' + m.content + '[/TOOL]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)

FENCED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<|sep|>' + m.content }}"
    "{% else %}{{ '<|end|>' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<|calls|>' if loop.first else '\n' }}{{ '<|call|>function<|sep|>' + c.function.name }}"
    "{{ '\n```json\n' }}{{ c.function.arguments | tojson }}{{ '\n```<|endcall|>' }}"
    "{{ '<|endcalls|>' if loop.last }}{% endfor %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>{% endif %}"
)
