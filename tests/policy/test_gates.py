"""The readers behind `make gates`, against texts of the tools; and that what they read is complete."""

import pytest
from gates import build, kernels, loops, occupancy, resources, rules, sass, sources
from sources import ROOT, name, tracked

PTXAS = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_Z1aIfEv' for 'sm_80'
ptxas info    : Function properties for _Z1aIfEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 456 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""

PTX = """\
.visible .entry _Z1aIfEv(
	.param .align 8 .b8 _Z1aIfEv_param_0[64]
)
.maxntid 128, 1, 1
{
	// begin inline asm
	// micro_shared_bytes 1536
	// end inline asm
	ret;
}
.visible .entry _Z1bv()
{
	ret;
}
"""

SASS = """\
.text._Z1aIfEv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   MOV R2, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0040*/                   LDS R9, [R3] ;
        /*0050*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R8, R10, R12 ;
        /*0070*/                   HMMA.16816.F32.BF16 R16, R8, R10, R16 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E [R2.64], R12 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
.text._Z1bv:
.L_x_4:
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   I2F.U32.RP R3, R4 ;
        /*0020*/                   CALL.REL.NOINC `($_Z1bv$__internal_0_$__cuda_sm20_div_u64) ;
        /*0030*/               @P0 BRA `(.L_x_4) ;
"""


def functions():
    return sass.parse(SASS)


# ---- resources ------------------------------------------------------------------------------------------------------


def test_registers_spills_and_stack_are_read():
    found = resources.parse_ptxas(PTXAS)
    assert found["_Z1aIfEv", "sm_80"] == resources.Usage(registers=40, static_shared=512)
    assert found["_Z1bv", "sm_90"] == resources.Usage(registers=255, stack=16, spills=12)


def test_launch_bounds_and_shared_memory_are_read():
    assert resources.parse_ptx(PTX) == {
        "_Z1aIfEv": resources.Launch(128, 1536),
        "_Z1bv": resources.Launch(0, 0),
    }
    assert resources.parse_ptx(".version 8.0") == {}


def test_no_table_excuses_a_spill_or_missing_bounds():
    names = {"_Z1aIfEv": "a<float>", "_Z1bv": "b"}
    usages = resources.parse_ptxas(PTXAS)
    table = resources.rows(usages, resources.parse_ptx(PTX), names)
    assert resources.faults(usages, table, names) == [
        "b on sm_90: 16 bytes of stack, 12 bytes of spills",
        "b has no __launch_bounds__",
    ]
    table[0].shared = 100 * 1024
    assert "shared memory" in resources.faults(usages, table, names)[1]


def test_a_table_that_changed_is_told_apart_from_another_compiler():
    table = resources.rows(resources.parse_ptxas(PTXAS), resources.parse_ptx(PTX), {"_Z1aIfEv": "a", "_Z1bv": "b"})
    old = resources.to_csv(table, ["sm_80", "sm_90"], "13.0")
    assert "a;128;2048;40;" in old.splitlines()
    assert resources.differences(old, old, "t.csv") == []
    new = old.replace("a;128;2048;40;", "a;128;2048;48;")
    assert resources.differences(old, new, "t.csv") == ["t.csv: was  a;128;2048;40;", "t.csv: now  a;128;2048;48;"]
    assert resources.differences(old, new.replace("13.0", "13.1"), "t.csv") == []


# ---- occupancy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks, limiter",
    [
        ("sm_80", 128, 32, 0, 16, "registers"),  # 65536 / (32 * 128)
        ("sm_80", 128, 128, 0, 4, "registers"),
        ("sm_80", 128, 129, 0, 3, "registers"),  # 136 registers are given
        ("sm_89", 128, 24, 0, 12, "warps"),  # 48 warps
        ("sm_90", 32, 16, 0, 32, "blocks"),
        ("sm_80", 128, 64, 48 * 1024, 3, "shared memory"),  # 164 KiB / 49 KiB
        ("sm_120", 256, 64, 99 * 1024, 1, "shared memory"),
    ],
)
def test_occupancy_by_hand(arch, threads, registers, shared, blocks, limiter):
    found = occupancy.occupancy(arch, threads, registers, shared)
    assert (found.blocks, found.limiter) == (blocks, limiter)
    assert found.warps == blocks * threads // 32


def test_the_nearest_cliff_is_named():
    assert occupancy.occupancy("sm_80", 128, 127, 0).cliff == "2 more registers"
    assert occupancy.occupancy("sm_80", 128, 64, 48 * 1024).cliff == "5888 more bytes of shared memory"


def test_every_architecture_of_the_build_has_its_limits():
    archs = kernels.architectures((ROOT / "kernels/cmake/MicroCuda.cmake").read_text())
    assert archs == ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert set(archs) <= set(occupancy.LIMITS)


# ---- machine code ---------------------------------------------------------------------------------------------------


def test_only_the_innermost_loop_counts():
    (loop,) = loops.innermost_loops(functions()["_Z1aIfEv"])
    assert loop[0].opcode == "LDG.E.128"
    assert loop[-1].base == "BRA"
    assert sass.mix(loop) == sass.Mix(
        instructions=7,
        tensor_core=2,
        matrix_loads=1,
        shared_loads=1,
        narrow_shared_loads=1,
        loads=2,
        wide_loads=2,
        stores=0,
        wide_stores=0,
        local=0,
        divisions=0,
    )


RARE = """\
.text.f:
        /*0000*/                   MOV R2, RZ ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   IADD3 R4, R4, R2, RZ ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   MUFU.RCP R4, R5 ;
        /*0050*/                   BRA `(.L_x_1) ;
"""


def test_a_jump_back_from_rare_code_is_no_loop():
    (function,) = sass.parse(RARE).values()
    assert loops.loops(function) == []
    assert loops.hottest(function) == function.code


NESTED = """\
.text.f:
.L_x_1:
        /*0000*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
.L_x_2:
        /*0010*/                   IADD3 R4, R4, R2, RZ ;
        /*0020*/                   BSSY B0, `(.L_x_3) ;
        /*0030*/               @P0 BRA `(.L_x_4) ;
        /*0040*/                   MOV R1, R2 ;
.L_x_4:
        /*0050*/                   BSYNC B0 ;
.L_x_3:
        /*0060*/                   BRA P1, `(.L_x_2) ;
        /*0070*/           @!UP0 BRA `(.L_x_1) ;
        /*0080*/                   BRA.DIV ~URZ, `(.L_x_5) ;
.L_x_5:
        /*0090*/                   FADD R4, R4, R2 ;
        /*00a0*/              @P2  CALL.REL.NOINC `(.L_x_6) ;
        /*00b0*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*00c0*/                   EXIT ;
"""


def test_the_hottest_loop_is_around_the_tensor_cores():
    (function,) = sass.parse(NESTED).values()
    inner, last = loops.innermost_loops(function)
    assert [i.base for i in last] == ["FADD", "CALL", "BRA"]
    assert [i.base for i in inner] == ["IADD3", "BSSY", "BRA", "MOV", "BSYNC", "BRA"]
    assert len(loops.loops(function)) == 3
    assert [i.base for i in loops.hottest(function)] == ["HMMA", *(i.base for i in inner), "BRA"]


def test_local_memory_and_division_are_found():
    assert rules.check("b", functions()["_Z1bv"], []) == [
        "b: 1 accesses to local memory",
        "b: 2 integer divisions in innermost loops",
    ]


@pytest.mark.parametrize(
    "wanted, fault",
    [
        ({"tensor_core": 0.25, "per_matrix_load": 2.0, "wide_loads": 1.0, "narrow_shared_loads": 1}, None),
        ({"tensor_core": 0.5}, "tensor-core instructions in the hottest loop: 2 of 7"),
        ({"per_matrix_load": 3.0}, "tensor-core instructions per LDSM: 2 of 1"),
        ({"wide_stores": 0.5}, "128-bit global stores: 0 of 1"),
        ({"narrow_shared_loads": 0}, "1 narrow LDS"),
    ],
)
def test_a_rule_asks_for_what_it_says(wanted, fault):
    rule = rules.Rule(kernels="a<.*>", reason="test", **wanted)
    found = rules.check("a<float>", functions()["_Z1aIfEv"], [rule])
    assert found == [] if fault is None else fault in found[0]
    assert rules.check("c", functions()["_Z1aIfEv"], [rule]) == []


def test_a_rule_without_a_kernel_is_a_finding():
    rule = rules.Rule(kernels="nothing", reason="test")
    assert rules.unused([rule], ["a"]) == ["gates.toml: no kernel is called 'nothing'"]
    with pytest.raises(TypeError):
        rules.read_rules('[[rule]]\nkernels = "a"\nreason = "b"\nunknown = 1\n')
    assert rules.read_rules((ROOT / "kernels/gates.toml").read_text())


def test_the_rows_of_the_instruction_table():
    text = rules.to_csv({"a<float>": functions()["_Z1aIfEv"]}, "sm_80", "13.0")
    assert text.splitlines()[-1] == "a<float>;13;2;2;1;0;7;2;1;1"


# ---- names and sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "demangled, short",
    [
        ("void micro_kernels::cuda::a_kernel<micro_kernels::BFloat16>(micro_kernels::P)", "a_kernel<BFloat16>"),
        ("void micro_kernels::cuda::(anonymous namespace)::b<float, (int)4, (x::E)1>(x::P)", "b<float, 4, 1>"),
        ("c", "c"),
    ],
)
def test_names_are_short(demangled, short):
    assert kernels.short_name(demangled) == short


def test_the_sources_are_those_of_the_build():
    listed = kernels.cuda_sources((ROOT / "kernels/CMakeLists.txt").read_text())
    assert sorted(f"kernels/{source}" for source in listed) == sorted(name(p) for p in tracked("kernels/*.cu"))
    stems = [source.split("/")[-1] for source in listed]
    assert len(set(stems)) == len(stems)  # each has a folder of its name in build/gates


@pytest.mark.parametrize(
    "line",
    [
        "cudaMemcpy(a, b, n, cudaMemcpyDeviceToHost);",
        "cudaStreamSynchronize(s);",
        "cudaMalloc(&p, n);",
        "const auto n = offsets.item<int64_t>();",
        "tensor.cpu();",
        "tensor.to(at::kCPU);",
        "at::nonzero(mask);",
    ],
)
def test_host_synchronisation_is_found(line):
    assert len(sources.search([("x.cpp", f"int a;\n{line}")])) == 1
    assert sources.search([("x.cpp", f"// {line}\ncudaMemcpyAsync(a, b, n, k, s);")]) == []
    assert sources.search([("x.cpp", f"int f_cpu(int a) {{\n  {line}\n}}")]) == []
    assert len(sources.search([("x.cpp", f"int f_cpu(int a) {{\n}}\nint g() {{\n  {line}\n}}")])) == 1


def test_the_operators_never_wait_for_the_device():
    assert sources.search(sources.device_sources(ROOT)) == []


def test_a_compiled_kernel_is_taken_again_until_a_source_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "KERNELS", tmp_path)
    header, dependencies = tmp_path / "a.cuh", tmp_path / "dependencies"
    header.write_text("1")
    dependencies.write_text(f"x.o : {tmp_path}/a.cu \\\n    {header} \\\n    /usr/include/stdio.h\n")
    key = build._key("13.0", ["-O3"], dependencies)
    assert build._key("13.0", ["-O3"], dependencies) == key
    assert build._key("13.1", ["-O3"], dependencies) != key
    header.write_text("2")
    assert build._key("13.0", ["-O3"], dependencies) != key
