use super::*;
use crate::read::ExitClass;
use crate::read::testing::{Spec, directory, file, write};

const FORMAT_ENTRY: (&str, &str) = ("format", FORMAT);

/// A file's metadata and tensors.
type Contents<'a> = (&'a [(&'a str, &'a str)], &'a [Spec<'a>]);

/// F32 zeros of a shape under a key.
fn zeros<'a>(key: &'a str, shape: &'a [usize]) -> Spec<'a> {
    (key, "F32", shape, vec![0; 4 * shape.iter().product::<usize>()])
}

/// Opens files of these metadata and tensors, named `0.safetensors`, `1.safetensors`, …
fn open(files: &[Contents<'_>]) -> Result<ModelStatistics, StatisticsError> {
    let directory = directory();
    let paths: Vec<PathBuf> = files
        .iter()
        .enumerate()
        .map(|(i, (metadata, tensors))| {
            let metadata = [&[FORMAT_ENTRY], *metadata].concat();
            write(directory.path(), &format!("{i}.safetensors"), file(&metadata, tensors))
        })
        .collect();
    let [mapped, pread] = [IoMode::Mmap, IoMode::Pread].map(|io| ModelStatistics::open(&paths, io));
    assert_eq!(mapped.as_ref().err().map(ToString::to_string), pread.err().map(|e| e.to_string()));
    mapped
}

fn assert_refused(files: &[Contents<'_>], expected: &str) {
    let error = open(files).expect_err("must be refused");
    assert_eq!(error.exit_class(), ExitClass::BadInput);
    let text = error.to_string();
    assert!(text.contains(expected), "{text}\ndoes not say: {expected}");
    assert!(text.contains(".safetensors: ") && !text.chars().any(char::is_control), "{text:?}");
}

#[test]
fn a_header_as_long_as_a_pickle_begins() {
    // 0x0280 to 0x0580 bytes: the first two bytes of the file are those of a pickle of protocol 2 to 5.
    for header in [640, 896, 1152, 1408] {
        let text = |filler: usize| "x".repeat(filler);
        let tensors = [zeros("w/input_gram", &[2, 2])];
        let length = |filler: usize| {
            let bytes = file(&[FORMAT_ENTRY, ("model", &text(filler))], &tensors);
            u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
        };
        let filler = (0..header).find(|filler| length(*filler) == header as u64).expect("some filler does");
        open(&[(&[("model", &text(filler))], &tensors)]).expect("well-formed");
    }
}

#[test]
fn kinds_and_forms() {
    let tensors = [
        zeros("l.a/w/input_gram", &[3, 3]),
        zeros("l.a/w/output_gram", &[10]),
        zeros("b/input_factor", &[2, 5]),
        zeros("b/output_factor", &[3, 3]),
        zeros("b/fisher_diagonal", &[2, 5, 1]),
        zeros("c/fisher_block", &[1]),
        zeros("c/input_mean", &[7]),
    ];
    let model = open(&[(&[("tokens", "12"), ("model", "m")], &tensors)]).expect("well-formed");
    let form = |parameter, kind| model.get(parameter, kind).expect("there").form;
    assert_eq!(form("l.a/w", Kind::InputGram), Form::Full { side: 3 });
    assert_eq!(form("l.a/w", Kind::OutputGram), Form::Packed { side: 4 });
    assert_eq!(form("b", Kind::InputFactor), Form::Factor { rank: 2, side: 5 });
    assert_eq!(form("b", Kind::OutputFactor), Form::Factor { rank: 3, side: 3 });
    assert_eq!(form("b", Kind::FisherDiagonal), Form::Dense);
    assert_eq!(form("c", Kind::FisherBlock), Form::Packed { side: 1 });
    assert_eq!(form("c", Kind::InputMean), Form::Dense);
    assert!(model.get("c", Kind::InputGram).is_none() && model.get("d", Kind::InputGram).is_none());
    assert_eq!(model.parameters().collect::<Vec<_>>(), ["b", "c", "l.a/w"]);
    assert_eq!(model.kinds("c").collect::<Vec<_>>(), [Kind::FisherBlock, Kind::InputMean]);
    assert_eq!(model.kinds("d").count(), 0);
    assert_eq!((model.metadata()["tokens"].as_str(), model.metadata().len()), ("12", 2));
    assert_eq!(model.total_bytes(), 4 * (9 + 10 + 10 + 9 + 10 + 1 + 7));
    for kind in Kind::ALL {
        assert_eq!(Kind::from_name(kind.name()), Some(kind));
    }
}

#[test]
fn values_are_read_by_ranges() {
    let directory = directory();
    let bytes: Vec<u8> = (0..8).collect();
    let path = write(
        directory.path(),
        "s.safetensors",
        file(&[FORMAT_ENTRY], &[("a/input_mean", "BF16", &[4], bytes)]),
    );
    for io in [IoMode::Mmap, IoMode::Pread] {
        let model = ModelStatistics::open(std::slice::from_ref(&path), io).expect("well-formed");
        let mean = model.get("a", Kind::InputMean).expect("there");
        assert_eq!((mean.elements(), mean.dtype, model.path_of(mean)), (4, Dtype::Bf16, path.as_path()));
        assert_eq!(model.read(mean, 2..5, &mut Vec::new()).expect("inside"), [2, 3, 4]);
        let error = model.read(mean, 2..9, &mut Vec::new()).expect_err("outside");
        assert!(error.to_string().contains("tensor `a/input_mean`: no such byte range"), "{error}");
        model.will_need(mean, 0..8);
        model.release(mean, 0..8, false);
        model.check_unchanged().expect("nobody touched it");
    }
}

#[test]
fn other_formats_are_refused() {
    let directory = directory();
    let tensors = [zeros("a/input_mean", &[1])];
    let refused = |metadata: &[(&str, &str)]| {
        let path = write(directory.path(), "s.safetensors", file(metadata, &tensors));
        ModelStatistics::open(&[path], IoMode::Mmap).expect_err("must be refused").to_string()
    };
    assert!(
        refused(&[]).contains("not a statistics file (got format none, expected `mats-stream-statistics/1`)")
    );
    assert!(refused(&[("format", "pt")]).contains("got format `pt`"));
    assert!(
        refused(&[("format", "mats-stream-statistics/2")]).contains("got format `mats-stream-statistics/2`")
    );
    assert_eq!(
        ModelStatistics::open(&[], IoMode::Mmap).expect("no files, no statistics").parameters().count(),
        0
    );
}

#[test]
fn keys_are_checked() {
    assert_refused(&[(&[], &[zeros("weight", &[1])])], "key `weight` (got no parameter and kind");
    assert_refused(&[(&[], &[zeros("/input_gram", &[1])])], "key `/input_gram` (got no parameter and kind");
    assert_refused(
        &[(&[], &[zeros("a/input_gramm\n", &[1])])],
        "has an unknown kind (got `input_gramm\\n`, expected a known one; the nearest is `input_gram`)",
    );
    assert_refused(&[(&[], &[zeros("a/fisher", &[1])])], "the nearest is `fisher_");
    assert_refused(&[(&[], &[("a/input_mean", "I32", &[1], vec![0; 4])])], "wrong dtype (got I32");
    assert_refused(&[(&[], &[("a/input_mean", "F8_E4M3", &[4], vec![0; 4])])], "wrong dtype (got F8_E4M3");
}

#[test]
fn shapes_are_checked() {
    for (key, shape, expected) in [
        ("a/input_gram", &[2, 3][..], "got [2, 3], expected a square matrix or a packed triangle"),
        ("a/output_gram", &[4], "got [4], expected a packed triangle, whose length is n·(n+1)/2"),
        ("a/input_gram", &[2, 2, 1], "expected a square matrix"),
        ("a/fisher_block", &[], "got [], expected a square matrix"),
        ("a/input_factor", &[3, 2], "got [3, 2], expected a matrix [r, side] with r ≤ side"),
        ("a/output_factor", &[3], "expected a matrix [r, side]"),
        ("a/input_mean", &[1, 1], "expected a vector"),
    ] {
        assert_refused(&[(&[], &[zeros(key, shape)])], expected);
    }
}

#[test]
fn triangles() {
    for side in [0usize, 1, 2, 3, 1000, 65_535, 3_037_000_499] {
        let length = side * (side + 1) / 2;
        assert_eq!(triangle_side(length), Some(side));
        if side > 1 {
            assert_eq!((triangle_side(length - 1), triangle_side(length + 1)), (None, None));
        }
    }
    assert_eq!(triangle_side(usize::MAX), None);
}

#[test]
fn one_key_in_one_file() {
    let gram = [zeros("a/input_gram", &[1, 1])];
    assert_refused(
        &[(&[], &gram), (&[], &gram)],
        "1.safetensors: key `a/input_gram` is in two files of one model (got it again, expected it only in",
    );
    let both = [zeros("a/input_gram", &[2, 2]), zeros("a/input_factor", &[1, 2])];
    assert_refused(&[(&[], &both)], "parameter `a` is ambiguous (got both input_gram and input_factor");
    let through_alias = [zeros("a/output_gram", &[2, 2]), zeros("b/output_factor", &[1, 2])];
    assert_refused(
        &[(&[("alias:a/output_factor", "b/output_factor")], &through_alias)],
        "parameter `a` is ambiguous",
    );
}

#[test]
fn aliases_reach_across_files_and_chains() {
    let model = open(&[
        (
            &[("alias:q/input_gram", "k/input_gram"), ("alias:k/input_gram", "v/input_gram")],
            &[zeros("q/output_gram", &[3])],
        ),
        (&[("alias:k/input_gram", "v/input_gram")], &[zeros("v/input_gram", &[2, 2])]),
    ])
    .expect("well-formed");
    for parameter in ["q", "k", "v"] {
        let gram = model.get(parameter, Kind::InputGram).expect("resolved");
        assert_eq!((gram.key.as_str(), gram.file), ("v/input_gram", 1));
    }
    assert_eq!(model.parameters().collect::<Vec<_>>(), ["k", "q", "v"]);
    assert_eq!(model.statistics().len(), 2);
    assert_eq!(
        model.aliases().collect::<Vec<_>>(),
        [("k/input_gram", "v/input_gram"), ("q/input_gram", "v/input_gram")]
    );
}

#[test]
fn aliases_that_lie() {
    let gram = [zeros("a/input_gram", &[1]), zeros("c/input_gram", &[1])];
    let with = |aliases: &[(&str, &str)], expected: &str| assert_refused(&[(aliases, &gram)], expected);
    with(&[("alias:a/input_gram", "c/input_gram")], "alias `a/input_gram` shadows a statistic");
    with(
        &[("alias:b/input_gram", "d/input_gram")],
        "alias `b/input_gram` dangles (got the target `d/input_gram`",
    );
    with(&[("alias:b/input_gram", "b/input_gram")], "alias `b/input_gram` loops");
    with(
        &[("alias:x/input_gram", "y/input_gram"), ("alias:y/input_gram", "x/input_gram")],
        "alias `x/input_gram` loops",
    );
    with(
        &[
            ("alias:w/input_gram", "x/input_gram"),
            ("alias:x/input_gram", "y/input_gram"),
            ("alias:y/input_gram", "x/input_gram"),
        ],
        "alias `w/input_gram` loops",
    );
    with(&[("alias:b/output_gram", "a/input_gram")], "alias `b/output_gram` changes the kind");
    with(&[("alias:b", "a/input_gram")], "key `b` (got no parameter and kind");
    with(&[("alias:b/input_gram", "a/gram")], "unknown kind (got `gram`");
    assert_refused(
        &[
            (&[("alias:b/input_gram", "a/input_gram")], &gram),
            (&[("alias:b/input_gram", "c/input_gram")], &[]),
        ],
        "alias `b/input_gram` has two targets (got `c/input_gram`, expected `a/input_gram` as in",
    );
}

#[test]
fn b24_sides_are_checked_against_the_parameter() {
    let model = open(&[(&[], &[zeros("a/input_gram", &[6]), zeros("a/fisher_diagonal", &[2, 3])])])
        .expect("well-formed");
    let gram = model.get("a", Kind::InputGram).expect("there");
    model.expect_side(gram, "a", 3).expect("it fits");
    let error = model.expect_side(gram, "a", 4).expect_err("it does not fit").to_string();
    assert!(
        error.ends_with("key `a/input_gram` does not fit parameter `a` (got side 3, expected 4)"),
        "{error}"
    );
    let fisher = model.get("a", Kind::FisherDiagonal).expect("there");
    model.expect_shape(fisher, "a", &[2, 3]).expect("it fits");
    let error = model.expect_shape(fisher, "a", &[3, 2]).expect_err("transposed").to_string();
    assert!(error.ends_with("(got [2, 3], expected [3, 2])"), "{error}");
    assert_eq!(model.get("b", Kind::InputGram), None);
}

#[test]
fn metadata_that_differs_is_warned_of() {
    let model =
        open(&[(&[("tokens", "1"), ("fisher", "true")], &[]), (&[("tokens", "2"), ("fisher", "true")], &[])])
            .expect("well-formed");
    assert_eq!(model.metadata()["tokens"], "1");
    let [warning] = model.warnings() else { panic!("{:?}", model.warnings()) };
    assert!(
        warning.ends_with("metadata `tokens` differs from an earlier file's (got `2`, kept `1`)"),
        "{warning}"
    );
}

#[test]
fn long_alias_chains_take_linear_time() {
    let names: Vec<(String, String)> = (0..20_000)
        .map(|i| (format!("alias:{i:05}/input_mean"), format!("{:05}/input_mean", i + 1)))
        .collect();
    let aliases: Vec<(&str, &str)> = names.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let model = open(&[(&aliases, &[zeros("20000/input_mean", &[1])])]).expect("well-formed");
    assert_eq!(model.get("00000", Kind::InputMean).map(|s| s.key.as_str()), Some("20000/input_mean"));
}
