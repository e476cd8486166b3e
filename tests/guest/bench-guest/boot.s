// PVH entry (32-bit protected mode, paging off, ebx = start info), the tables of the CPU, and everything that runs at
// CPL 0. All tables are laid out by the assembler, so that set-up is about thirty instructions: where KVM emulates
// CPL 0, each costs most of a microsecond.

.set BASE,      0x200000
.set STUBS,     BASE + 0x7000       // one interrupt stub of 32 bytes per vector
.set LAPIC_EOI, 0xfee000b0


// How CPL 3 gets at CPL 0: an invalid instruction (ud2) with this in r10 and the address of a gate in r11. Not by `int n`:
// KVM without hardware virtualization emulates it, and its emulator knows it in real mode only. See gate.rs.
.set GATE_MAGIC, 0x4f424731


.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                  // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "awx", @progbits
.globl boot_base, first_line, first_line_end, boot_pml4, boot_tss, pvh_entry, irq_counts, irq_total, exception_info
.globl gate_wait, gate_halt, gate_enable, gate_wrmsr, gate_cpuid, gate_triple

boot_base:
// Page tables: 4 GiB identity mapped by 2 MiB pages, user accessible, accessed and dirty bits set in advance.
boot_pml4:
    .quad boot_pdpt + 0x27
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x27, boot_pd + 0x1027, boot_pd + 0x2027, boot_pd + 0x3027
    .fill 508, 8, 0
boot_pd:
.set i, 0
.rept 1536
    .quad i * 0x200000 + 0xe7
    .set i, i + 1
.endr
.rept 512                           // 3..4 GiB is devices: uncached
    .quad i * 0x200000 + 0xff
    .set i, i + 1
.endr

.org 0x6000
// IDT: interrupt gates to the stubs.
boot_idt:
.set i, 0
.rept 256
    .word (STUBS + i * 32) & 0xffff, 0x08
    .word 0x8e00, STUBS >> 16
    .quad 0
    .set i, i + 1
.endr

.org 0x7000
.code64
// Exceptions 0..31.
.set i, 0
.rept 32
    .org 0x7000 + i * 32
    .if i == 6
    jmp invalid_instruction
    .else
    .if !((i == 8) || ((i >= 10) && (i <= 14)) || (i == 17) || (i == 21) || (i == 29) || (i == 30))
    push 0
    .endif
    push i
    jmp exception_common
    .endif
    .set i, i + 1
.endr
// Interrupts: count, end of interrupt, return.
.rept 255 - 32
    .org 0x7000 + i * 32
    inc qword ptr [irq_total]
    inc qword ptr [irq_counts + i * 8]
    movabs dword ptr [LAPIC_EOI], eax
    iretq
    .set i, i + 1
.endr
.org 0x7000 + 32 * 255              // spurious: no end of interrupt
    iretq

.org 0x9000
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff        // 0x08 code, CPL 0
    .quad 0x00cf93000000ffff        // 0x10 data, CPL 0
    .quad 0x00cff3000000ffff        // 0x1b data, CPL 3
    .quad 0x00affb000000ffff        // 0x23 code, CPL 3
    .word 0x2068, 0xa000            // 0x28 TSS at BASE + 0xa000
    .byte 0x20, 0x89, 0x00, 0x00
    .quad 0
boot_gdt_end:
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .quad boot_gdt
boot_idt_pointer:
    .word 4095
    .quad boot_idt
boot_no_idt:
    .word 0
    .quad 0
.balign 8
boot_frame:                         // what the last CPL 0 instruction of the set-up returns to
    .quad user_entry, 0x23, 0x3002, user_stack_end, 0x1b
irq_total:
    .quad 0
exception_info:                     // vector, error code, rip, cr2
    .quad 0, 0, 0, 0
first_line:
    .ascii "{\"event\":\"start\"}\n"
first_line_end:

.balign 16
.code32
pvh_entry:
    cld
    mov esi, offset first_line
    mov ecx, 18                     // first_line_end - first_line
    mov edx, 0x3f8
    rep outsb
    lgdt [boot_gdt_pointer]
    mov eax, 0x620                  // CR4: PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080             // EFER.LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80000033             // CR0: PG, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                      // ljmp 0x08:long_mode
    .long long_mode
    .word 0x08
.code64
long_mode:
    lidt [boot_idt_pointer]
    mov eax, 0x28
    ltr ax
    mov esp, offset boot_frame
    iretq

user_entry:                         // CPL 3 from here on
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    shr ecx, 3
    xor eax, eax
    rep stosq
    mov edi, ebx
    call guest_main

gate_wait:                          // sleep unless an interrupt came since the caller read irq_total into rdi
    cmp qword ptr [irq_total], rdi
    jne 1f
    sti                             // takes effect after hlt: nothing can slip in between
    hlt
1:  iretq
gate_halt:
    cli
    hlt
    jmp gate_halt
gate_enable:
    or qword ptr [rsp + 16], 0x200
    iretq
gate_wrmsr:
    wrmsr
    iretq
gate_cpuid:
    cpuid
    iretq
gate_triple:
    lidt [boot_no_idt]
    ud2

invalid_instruction:
    cmp r10d, GATE_MAGIC
    jne 1f
    add qword ptr [rsp], 2          // behind the ud2
    jmp r11
1:  push 0
    push 6
exception_common:                   // report at CPL 3, on a stack of its own
    pop qword ptr [exception_info]
    pop qword ptr [exception_info + 8]
    mov rax, qword ptr [rsp]
    mov qword ptr [exception_info + 16], rax
    mov rax, cr2
    mov qword ptr [exception_info + 24], rax
    mov qword ptr [rsp], offset guest_exception
    mov qword ptr [rsp + 8], 0x23
    mov qword ptr [rsp + 16], 0x3002
    mov qword ptr [rsp + 24], offset exception_stack_end - 8
    mov qword ptr [rsp + 32], 0x1b
    iretq

.org 0xa000
boot_tss:
    .long 0
    .quad kernel_stack_end          // RSP0
    .fill 22, 4, 0
    .word 0, 104                    // the I/O bitmap follows and allows every port
    .fill 8192, 1, 0
    .byte 0xff

.section .noinit, "aw", @nobits
.balign 4096
    .space 4096
kernel_stack_end:
    .space 16384
exception_stack_end:
    .space 262144
user_stack_end:

.section .bss.irq, "aw", @nobits
.balign 64
irq_counts:
    .space 2048
.section .text
