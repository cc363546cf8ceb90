package gemma.core

import java.io.File
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull

/** Runs the cases that Kotlin and Swift share. */
class StructuredTest {
    private val cases = (parseJson(File(DATA, "schema_cases.json").readText()) as JsonObject).fields

    private fun each(name: String, check: (Map<String, Json>) -> Unit) {
        (cases.getValue(name) as JsonArray).items.forEach { check((it as JsonObject).fields) }
    }

    private fun text(json: Json?): String = (json as JsonString).text

    @Test
    fun `JSON is parsed strictly and survives a round trip`() = each("parse") { case ->
        val text = text(case["text"])
        if (case["ok"] == JsonBoolean(true)) {
            val value = parseJson(text)
            assertEquals(value, parseJson(value.write()))
        } else {
            assertFailsWith<JsonException>(text) { parseJson(text) }
        }
    }

    @Test
    fun `JSON is extracted from the text around it`() = each("extract") { case ->
        val extracted = extractJson(text(case["text"]))
        if (case["json"] == JsonNull) assertNull(extracted) else assertEquals(parseJson(text(case["json"])), extracted)
    }

    @Test
    fun `validation reports the path of each violation`() = each("validate") { group ->
        val schema = Schema.of(group.getValue("schema"))
        for (case in (group.getValue("cases") as JsonArray).items) {
            val fields = (case as JsonObject).fields
            val paths = (fields.getValue("paths") as JsonArray).items.map(::text)
            val value = fields.getValue("json")
            assertEquals(paths, schema.validate(value).map { it.path }.distinct().sorted(), value.write())
        }
    }

    @Test
    fun `a schema with an unsupported keyword or a wrong value is refused by name`() = each("refuse") { case ->
        val error = assertFailsWith<SchemaException> { Schema.of(case.getValue("schema")) }
        assertContains(error.message.orEmpty(), text(case["names"]))
    }

    @Test
    fun `the example schema is valid`() {
        val schema = Schema.parse(EXAMPLE_SCHEMA)
        assertEquals(emptyList(), schema.validate(parseJson("""{"answer": "yes", "confidence": 0.5}""")))
        assertEquals(schema.toString(), Schema.parse(schema.toString()).toString())
    }

    @Test
    fun `any text either parses or throws a JsonException`() {
        val random = Random(3)
        val letters = "{}[]\",:0123.eE+-truefalsn\\u\u0000 \ud83d\ude00"
        repeat(20_000) {
            val text = String(CharArray(random.nextInt(24)) { letters[random.nextInt(letters.length)] })
            try {
                parseJson(text)
            } catch (_: JsonException) {
                return@repeat
            }
        }
        assertFailsWith<JsonException> { parseJson("[".repeat(1_000_000)) }
    }
}

class LatencyMeterTest {
    @Test
    fun `latency follows the clock`() {
        var now = 0L
        val meter = LatencyMeter { now }
        meter.load { now += 2_000_000_000 }
        assertNull(meter.latency().tokensPerSecond)
        meter.start()
        now += 500_000_000
        meter.token()
        repeat(19) { now += 100_000_000; meter.token() }
        now += 300_000_000
        meter.token()
        val latency = meter.latency()
        assertEquals(Latency(2000.0, 500.0, 1000 * 20 / 2200.0, 110.0, 21), latency.copy(tokenP95Ms = 110.0))
        assertEquals(110.0, latency.tokenP95Ms!!, 1e-6)
    }
}
