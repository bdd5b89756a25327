use super::*;

/// Opcodes of `{name: tensor}` as torch.save writes them, protocol 2.
fn tensor(name: &str, storage: &[u8], numbers: &[u8]) -> Vec<u8> {
    [
        b"X".as_slice(),
        &(name.len() as u32).to_le_bytes(),
        name.as_bytes(),
        b"ctorch._utils\n_rebuild_tensor_v2\n(",
        storage,
        numbers,
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

const STORAGE: &[u8] = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x09tQ";
/// Offset 0, sizes (3, 3), strides (3, 1).
const NUMBERS: &[u8] = b"K\0K\x03K\x03\x86K\x03K\x01\x86";

fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02".as_slice(), body, b"."].concat()
}

fn one(storage: &[u8], numbers: &[u8]) -> Result<Vec<(String, PickledTensor)>, String> {
    tensors(&pickle(&[b"}(".as_slice(), &tensor("a", storage, numbers), b"u"].concat()))
}

fn refused(body: &[u8], expected: &str) {
    let error = tensors(&pickle(body)).expect_err("must be refused");
    assert!(error.contains(expected), "{error}\ndoes not say: {expected}");
}

#[test]
fn a_dictionary_of_one_tensor() {
    let found = one(STORAGE, NUMBERS).expect("as torch writes it");
    let expected = PickledTensor {
        storage: "0".to_owned(),
        dtype: Dtype::F32,
        storage_elements: 9,
        offset: 0,
        shape: vec![3, 3],
        strides: vec![3, 1],
    };
    assert_eq!(found, [("a".to_owned(), expected)]);
    assert_eq!(tensors(&pickle(b"}")), Ok(vec![]));
    // An ordered dictionary with attributes, filled item by item; sizes as torch.Size.
    let body = [
        b"ccollections\nOrderedDict\n)R".as_slice(),
        &tensor("a", STORAGE, b"K\0ctorch\nSize\nK\x03\x85\x85RK\x01\x85"),
        b"s}X\x09\0\0\0_metadata}sb",
    ]
    .concat();
    assert_eq!(tensors(&pickle(&body)).expect("a state dictionary")[0].1.shape, [3]);
}

#[test]
fn the_memo_and_newer_protocols() {
    // Protocol 4: frame, short strings, MEMOIZE, STACK_GLOBAL; the storage is said once and recalled.
    let storage =
        b"(\x8c\x07storage\x94\x8c\x05torch\x8c\x0cFloatStorage\x93\x8c\x010\x8c\x03cpuM\x09\0t\x94Q";
    let body = [
        b"\x95\x01\0\0\0\0\0\0\0}(".as_slice(),
        &tensor("a", storage, NUMBERS),
        &tensor("b", b"h\x01Q", NUMBERS),
        b"u",
    ]
    .concat();
    let found = tensors(&[b"\x80\x04".as_slice(), &body, b"."].concat()).expect("legal");
    assert_eq!((found[0].1.clone(), found[1].0.as_str()), (found[1].1.clone(), "b"));
}

#[test]
fn integers_of_every_width() {
    for (numbers, offset) in [
        (b"\x8a\0".as_slice(), 0),
        (b"\x8a\x03\x00\x00\x01", 65536),
        (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", i64::MAX as u64),
        (b"J\xff\xff\xff\x7f", i32::MAX as u64),
        (b"M\xff\xff", 65535),
    ] {
        let found = one(STORAGE, &[numbers, &NUMBERS[2..]].concat()).expect("legal");
        assert_eq!(found[0].1.offset, offset);
    }
    for (numbers, expected) in [
        (b"\x8a\x01\xff".as_slice(), "none below 0"),
        (b"J\xff\xff\xff\xff", "none below 0"),
        (b"\x8a\x09\0\0\0\0\0\0\0\0\x01", "at most 8"),
        (b"G\0\0\0\0\0\0\0\0", "a number as an offset"),
        (b"N", "None as an offset"),
    ] {
        let error = one(STORAGE, &[numbers, &NUMBERS[2..]].concat()).expect_err("must be refused");
        assert!(error.contains(expected), "{error}");
    }
    // A negative stride reads a storage backwards.
    let error = one(STORAGE, b"K\0K\x03K\x03\x86J\xfd\xff\xff\xffK\x01\x86").expect_err("must be refused");
    assert!(error.contains("stride of -3"), "{error}");
}

#[test]
fn what_a_pickle_could_run_is_refused_by_name() {
    refused(b"cos\nsystem\n(X\x05\0\0\0touchtR", "global `os.system`");
    refused(b"cposix\nsystem\n", "`posix.system`");
    refused(b"c__builtin__\neval\n", "`__builtin__.eval`");
    refused(b"cbuiltins\ngetattr\n", "`builtins.getattr`");
    refused(b"ctorch\nload\n", "`torch.load`");
    refused(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__");
    refused(b"\x8c\x02os\x8c\x06system\x93", "`os.system`");
    refused(b"(X\x02\0\0\0lsios\nsystem\n", "INST");
    refused(b"(cos\nsystem\no", "`os.system`");
    refused(b"}}\x81", "NEWOBJ");
    refused(b"}}\x92", "NEWOBJ_EX");
    refused(b"\x82\x01", "EXT");
    refused(b"P0\n", "PERSID");
    refused(b"cc\x1b[31m\nx\n", "c\\u{1b}[31m.x");
}

#[test]
fn attributes_only_on_dictionaries() {
    refused(b"ctorch\nSize\n}b", "BUILD on a class");
    refused(b"}(b", "empty stack");
    refused(b")}b", "BUILD on a tuple");
}

#[test]
fn calls_are_described_only_with_the_arguments_they_have() {
    refused(b"ccollections\nOrderedDict\n}R", "a dictionary as arguments");
    refused(b"ccollections\nOrderedDict\nK\x01\x85R", "unexpected arguments");
    refused(b"})R", "got a call of a dictionary");
    refused(b"ctorch\nFloatStorage\nK\x09\x85R", "unexpected arguments");
    refused(b"ctorch\nSize\nK\x01\x85R", "torch.Size of a number");
    // A tensor without a storage, with a hook, with a negated or conjugated view.
    refused(b"ctorch._utils\n_rebuild_tensor_v2\n(K\0K\0))\x89}tR", "without a storage");
    let with = |hooks: &[u8], rest: &[u8]| {
        [b"ctorch._utils\n_rebuild_tensor_v2\n(".as_slice(), STORAGE, NUMBERS, b"\x89", hooks, rest, b"tR"]
            .concat()
    };
    refused(&with(b"}K\0K\0s", b""), "unexpected arguments");
    refused(&with(b"}", b"}X\x03\0\0\0neg\x88s"), "unexpected arguments");
    refused(&with(b"}", b"}}"), "unexpected arguments");
    refused(&with(b"}", b"N"), "a tensor at the top");
    // Parameters of anything else.
    refused(b"ctorch._utils\n_rebuild_parameter\n(K\0\x88}tR", "a parameter of a number");
    // Storages.
    refused(b"K\0Q", "malformed reference");
    refused(b"(X\x07\0\0\0storagectorch\nSize\nX\x01\0\0\x000X\x03\0\0\0cpuK\x09tQ", "malformed reference");
    refused(
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\xfftQ",
        "malformed reference",
    );
}

#[test]
fn shapes_and_ranks() {
    for (numbers, expected) in [
        (b"K\0K\x03\x85K\x03K\x01\x86".as_slice(), "2 strides for 1 dimensions"),
        (b"K\0K\x03K\x03", "a number as a shape"),
        (
            b"K\0(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t)",
            "17 dimensions",
        ),
        (b"K\0}\x85}\x85", "a dictionary as an offset, size or stride"),
    ] {
        let error = one(STORAGE, numbers).expect_err("must be refused");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn only_a_dictionary_of_tensors() {
    refused(b"N", "None at the top");
    refused(&[STORAGE, b"0"].concat(), "POP");
    refused(STORAGE, "a storage at the top");
    refused(b"}X\x01\0\0\0aK\x01s", "key `a` holds a number");
    refused(b"}K\x01K\x01s", "a number as a key");
    refused(b"}(X\x01\0\0\0au", "a key without a value");
    let twice =
        [b"}(".as_slice(), &tensor("a", STORAGE, NUMBERS), &tensor("a", STORAGE, NUMBERS), b"u"].concat();
    refused(&twice, "`a` is there twice");
    // A dictionary in itself: nothing here follows it.
    refused(b"}q\0X\x01\0\0\0ah\0s", "key `a` holds a dictionary");
    refused(b"]", "EMPTY_LIST");
}

#[test]
fn stacks_and_ends() {
    refused(b"", "empty stack");
    refused(b"}}", "behind its end");
    refused(b"t", "no mark");
    refused(b"K\x01(\x85", "empty stack");
    refused(b"h\x07", "empty place 7");
    refused(b"(q\0", "empty stack");
    refused(b"X\xff\xff\xff\xff", "ends within");
    refused(b"X\x02\0\0\0\xff\xff", "not UTF-8");
    refused(b"\x95\xff\0\0\0\0\0\0\0}", "a frame of 255 bytes");
    refused(b"cabc", "ends within a name");
    for (bytes, expected) in [
        (b"".as_slice(), "ends within"),
        (b"}.", "no protocol"),
        (b"\x80\x01}.", "protocol 1"),
        (b"\x80\x06}.", "protocol 6"),
        (b"\x80\x02}.x", "behind its end"),
        (b"\x80\x02}", "ends within"),
    ] {
        let error = tensors(bytes).expect_err("must be refused");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn bombs_cost_what_they_weigh() {
    // A million nested tuples, marks, and a tuple of two of the one before it, thirty deep: 2³⁰ leaves.
    refused(&[b")".as_slice(), &b"\x85".repeat(1_000_000)].concat(), "nested more than 32 deep");
    refused(&b"(".repeat(1_000_000), "nested more than 32 deep");
    let doubled: Vec<u8> = [b"K\x01q\0".as_slice(), &b"h\0h\0\x86q\0".repeat(30)].concat();
    refused(&doubled, "more behind its end");
    let nested: Vec<u8> = b"}X\x01\0\0\0a".repeat(1_000_000);
    refused(&[nested.as_slice(), &b"s".repeat(1_000_000)].concat(), "opcodes");
    refused(&b"N".repeat(MAX_OPCODES + 1), "more than 2000000 opcodes");
    let mut memo = b"N".to_vec();
    for place in 0..=MAX_MEMO as u32 {
        memo.push(b'r');
        memo.extend(place.to_le_bytes());
    }
    refused(&memo, "a memo of more than 1000000 places");
}
