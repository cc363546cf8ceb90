package gemma.core

/** Typed reads from a bundle's JSON file. A missing or mistyped field throws a BundleException that names it. */
internal class JsonFields(private val file: String, private val path: String, internal val value: Json) {
    fun of(name: String): JsonFields {
        val field = objectFields()[name] ?: throw invalid("$path has no \"$name\"")
        return JsonFields(file, "$path.$name", field)
    }

    /** The field, or null if it is missing or its value is null. */
    fun orNull(name: String): JsonFields? = if (name in objectFields()) of(name).takeIf { it.value != JsonNull } else null

    fun string(): String = (value as? JsonString)?.text ?: throw wrong("a string")

    /** A string that is not empty. */
    fun text(): String = string().ifEmpty { throw wrong("a text") }

    /** The value that a string has as JSON. */
    fun json(): Json = try {
        parseJson(string())
    } catch (error: JsonException) {
        throw wrong("JSON (${error.message})")
    }

    /** Two texts. */
    fun pair(): Pair<String, String> {
        val texts = list { it.string() }
        if (texts.size != 2 || texts.any { it.isEmpty() }) throw wrong("two texts")
        return texts[0] to texts[1]
    }

    fun boolean(): Boolean = (value as? JsonBoolean)?.value ?: throw wrong("true or false")

    fun double(): Double = (value as? JsonNumber)?.value ?: throw wrong("a number")

    fun integer(): Long {
        val number = double()
        if (number != Math.rint(number) || Math.abs(number) > LARGEST_EXACT) throw wrong("a whole number")
        return number.toLong()
    }

    /** A whole number of at least 0 that fits in 32 bits. */
    fun count(): Int {
        val number = integer()
        if (number < 0 || number > Int.MAX_VALUE) throw wrong("a whole number of at least 0 that fits in 32 bits")
        return number.toInt()
    }

    fun <T> list(read: (JsonFields) -> T): List<T> {
        val items = (value as? JsonArray)?.items ?: throw wrong("a list")
        return items.mapIndexed { index, item -> read(JsonFields(file, "$path[$index]", item)) }
    }

    fun <T> map(read: (JsonFields) -> T): Map<String, T> =
        objectFields().mapValues { (name, item) -> read(JsonFields(file, "$path.$name", item)) }

    fun isString(): Boolean = value is JsonString

    fun isNull(): Boolean = value == JsonNull

    fun wrong(expected: String): BundleException = invalid("$path is ${value.write().take(40)}, expected $expected")

    private fun objectFields(): Map<String, Json> = (value as? JsonObject)?.fields ?: throw wrong("an object")

    private fun invalid(what: String) = BundleException("$file is not valid: $what; export the model again")

    companion object {
        private const val LARGEST_EXACT = 9007199254740992.0 // 2^53: beyond it a double skips whole numbers

        /** Throws BundleException if the text is not JSON. */
        fun parse(file: String, text: String): JsonFields = try {
            JsonFields(file, "$", parseJson(text))
        } catch (error: JsonException) {
            throw BundleException("$file can't be read: ${error.message}; copy the whole bundle folder again", error)
        }
    }
}
